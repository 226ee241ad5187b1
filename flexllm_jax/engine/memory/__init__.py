"""What an engine has on its devices, and where: shapes, pools, activations; a plan that fits."""
