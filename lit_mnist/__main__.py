import sys

from lit_mnist.commands.main import main

sys.exit(main())
