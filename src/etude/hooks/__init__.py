"""The methods of `Trainer` that users call and override, one file per room they forward to."""
