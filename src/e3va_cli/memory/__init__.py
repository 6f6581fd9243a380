"""Where the memory of a training step goes: followed op by op, planned without running, measured, judged."""
