"""What runs show: learning curves, statistics over seeds, tables and figures."""
