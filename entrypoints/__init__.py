"""What `mlflow run` calls: one module per entry point of MLproject, each read top to bottom."""
