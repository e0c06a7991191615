"""The market replay: real recorded bars behind provider-shaped APIs."""
