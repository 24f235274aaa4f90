"""Linear-attention modules, one file each; `hybrid_layers.MIXERS` names them."""
