"""From the records of runs to what one wants to know of them; nothing here takes part in a run."""
