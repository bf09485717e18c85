"""Apart, since multiprocessing would import a main module of any other name again in each process that it forks."""

from tests.support.kills import main

main()
