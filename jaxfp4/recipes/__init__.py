"""Layer 3: recipes, and the plan that a recipe makes of a model."""

from jaxfp4.recipes.methods import Awq as Awq
from jaxfp4.recipes.methods import FourOverSix as FourOverSix
from jaxfp4.recipes.methods import Gptq as Gptq
from jaxfp4.recipes.methods import Hadamard as Hadamard
from jaxfp4.recipes.methods import HeadroomActivations as HeadroomActivations
from jaxfp4.recipes.methods import LocalHessian as LocalHessian
from jaxfp4.recipes.methods import Max as Max
from jaxfp4.recipes.methods import MaxActivations as MaxActivations
from jaxfp4.recipes.methods import Method as Method
from jaxfp4.recipes.methods import Mse as Mse
from jaxfp4.recipes.methods import MseActivations as MseActivations
from jaxfp4.recipes.methods import Nearest as Nearest
from jaxfp4.recipes.methods import Order as Order
from jaxfp4.recipes.methods import PercentileActivations as PercentileActivations
from jaxfp4.recipes.methods import SmoothQuant as SmoothQuant
from jaxfp4.recipes.methods import WeightedMse as WeightedMse
from jaxfp4.recipes.plan import Plan as Plan
from jaxfp4.recipes.plan import PlannedWeight as PlannedWeight
from jaxfp4.recipes.plan import plan as plan
from jaxfp4.recipes.presets import get as get
from jaxfp4.recipes.presets import names as names
from jaxfp4.recipes.recipe import ExpertScale as ExpertScale
from jaxfp4.recipes.recipe import Recipe as Recipe
from jaxfp4.recipes.recipe import Rule as Rule
from jaxfp4.recipes.recipe import Scheme as Scheme
from jaxfp4.transform.weights import Role as Role
