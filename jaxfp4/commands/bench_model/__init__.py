"""`jaxfp4 bench model`: what calibrating and quantizing a whole model costs, on one device and on several."""
