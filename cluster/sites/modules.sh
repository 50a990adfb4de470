# modules.sh - a site with environment modules (Lmod). Names and versions are the site's.
#
# A batch shell is not a login shell: where `module` is unknown, its set-up file is read first.
command -v module >/dev/null || . /etc/profile.d/modules.sh
module purge
module load gcc/12 cuda/12.8 openmpi/4.1
# GPUs of one node that train one model each open many files and lock memory.
ulimit -n 65536 -l unlimited
