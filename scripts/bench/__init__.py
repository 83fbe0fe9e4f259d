"""What clipping costs: a step, a Trainer, a controller's update, a ledger."""
