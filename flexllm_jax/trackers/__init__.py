"""Where the progress of finetuning jobs is told: TensorBoard, Weights & Biases, MLflow."""
