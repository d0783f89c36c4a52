"""What the evaluate stage measures, one module per question; `stages.evaluate` puts the answers together."""

FORMAT = 2  # of `results.json`: raised whenever the report could not read what was written before
