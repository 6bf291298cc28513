"""The command `lrs-edge`: one file per subcommand.

`main.py` finds the subcommands and turns errors into one line and an exit code; `common.py` and
`search_options.py` hold the options that several share; `checks.py` is what `doctor.py` shows;
`progress.py` and `eval_progress.py` draw the lines on standard error.
"""
