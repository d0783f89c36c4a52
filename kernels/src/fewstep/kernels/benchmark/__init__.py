"""What the operations cost and how exact they are, beside what PyTorch offers: the machinery of `make gpu-check`.

`case` says what is measured, one file per operation lists its shapes, `error` and `timing` measure one case by one
backend, `worker` does so in its own process, `runner` walks all of them under a clock and `results` keeps the rows.
"""
