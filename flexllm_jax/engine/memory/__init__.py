"""What an engine has on its device: shapes, pools, activations, and the plan that they fit."""
