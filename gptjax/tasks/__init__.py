"""Tasks for a pre-trained model: records to examples, a head or none, a loss, measures. One file a kind, all in `table.TASKS`."""
