"""One module per kind of stage, with one function `run(ctx: StageContext) -> None`."""
