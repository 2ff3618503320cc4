"""Update rules, one a file, and the parameter groups that they work on."""
