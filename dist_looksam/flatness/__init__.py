"""How flat the minimum of a trained run is, measured: loss around w, curvature, rounding."""
