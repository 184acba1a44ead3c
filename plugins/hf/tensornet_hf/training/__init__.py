"""Training with `Trainer`: callbacks for mixtures, healing of compressed models."""
