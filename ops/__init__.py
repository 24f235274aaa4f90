"""Pure functions on tensors: one file per recurrence, and the fused distillation head."""
