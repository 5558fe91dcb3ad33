"""One model over all columns: encryption, the encrypted gradient exchange, estimators, the command line."""
