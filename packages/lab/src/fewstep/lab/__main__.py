"""`python -m fewstep.lab` is the `fewstep` command; torchrun wants a module."""

from fewstep.lab.cli import main

raise SystemExit(main())
