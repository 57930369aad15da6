"""One family of linear attention: keys and values are summarised under a feature map, queries attend to the summary."""
