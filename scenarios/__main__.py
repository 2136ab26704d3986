"""`python -m fedtap.scenarios` is the command line, as `fedtap` is."""

from fedtap.scenarios.command.entry import main

main()
