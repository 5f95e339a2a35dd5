"""The command line `ailurus-hf`: one small file per subcommand. Only their bodies import torch and transformers."""
