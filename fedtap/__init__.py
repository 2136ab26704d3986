"""What federated learning leaks."""
