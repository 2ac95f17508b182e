import sys

from lit_mnist.cli import main

sys.exit(main())
