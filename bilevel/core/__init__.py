"""Values that everything else is made of: trees of tensors, rows, statuses, counted costs, options, files."""
