"""The methods transcribed in numpy float64 from their equations (never from any code), and tests against them."""
