"""What the evaluate stage measures, one module per question; `stages.evaluate` puts the answers together."""
