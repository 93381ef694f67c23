"""The operations that training spends its time in, one file each."""
