"""The application: data, metrics, training loop, launching, command line, reports."""
