"""How a run happens on Ray: the driver, the loop on each worker, and the recipes."""
