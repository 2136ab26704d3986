"""`python -m fedtap.scenarios` is the command line, as `fedtap` is."""

from fedtap.scenarios.command.main import main

main()
