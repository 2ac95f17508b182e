"""What makes a Lightning run exact, durable, logged and equal on several processes, whatever it trains.

Nothing here knows the experiment, and all imports within are relative: the folder can be copied into another project.
There, this is a fit that can be killed anywhere and resumed:

    run = Run().claim(Path("runs"))               # or Run.resumed(checkpoint, read_checkpoint(checkpoint))
    trainer = Trainer(callbacks=make_callbacks(run, SaveSettings()), plugins=make_plugins(run), logger=make_logger(run))
    with hold(run, trainer):
        trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint, weights_only=True)
"""
