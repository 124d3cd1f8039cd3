"""FedLoGe (ICLR 2024): one federated run that yields a generic and many personal models from long-tailed data."""
