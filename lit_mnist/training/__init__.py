"""What makes a Lightning run exact, durable, logged and equal on several processes, whatever it trains.

Nothing here knows the experiment, and all imports within are relative: the folder can be copied into another project.
There, this is a fit that can be killed anywhere and resumed:

    run = Run.new(Path("runs"))                   # or Run.resumed(checkpoint, read_checkpoint(checkpoint))
    trainer = Trainer(callbacks=callbacks(run, LastCheckpoint()), logger=run_logger(run), plugins=plugins(run), ...)
    with run.held(trainer):
        trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)

with `Run`, `callbacks`, `plugins` and `run_logger` from `.run`, and checkpoints from `.checkpoints`.
"""
