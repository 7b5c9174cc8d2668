"""Layer 3: recipes, and the plan that a recipe makes of a model."""

from jaxfp4.recipes.plan import Plan as Plan
from jaxfp4.recipes.plan import PlannedWeight as PlannedWeight
from jaxfp4.recipes.plan import plan as plan
from jaxfp4.recipes.recipe import ExpertScale as ExpertScale
from jaxfp4.recipes.recipe import Recipe as Recipe
from jaxfp4.recipes.recipe import Rule as Rule
from jaxfp4.recipes.recipe import Scheme as Scheme
from jaxfp4.recipes.recipe import get as get
from jaxfp4.recipes.recipe import names as names
from jaxfp4.transform.weights import Role as Role
