"""One module per command of `fastgpt`: EXAMPLES, add_arguments(parser), run(args) -> exit status."""
