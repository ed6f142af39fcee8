"""The mathematics of closed-form editing on plain tensors: no model, no tokenizer, no
file but the update's. Public names come from `unified_edit`."""
