"""Tables, figures, searches and replays made of the records of runs; no run imports this."""
