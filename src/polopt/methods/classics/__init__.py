"""The methods that everything else is compared with."""
