"""Key/value stores: where attention finds the past. All satisfy `model.text.KVStore`."""
