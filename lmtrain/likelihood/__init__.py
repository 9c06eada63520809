"""What exact likelihood is good for: files without loss, scores, anomalies, divergence, cross-validation."""
