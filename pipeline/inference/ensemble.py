def measure_ensemble(runs):
    return {}
