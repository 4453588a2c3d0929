"""What the weights alone say of outliers, read tensor by tensor."""
