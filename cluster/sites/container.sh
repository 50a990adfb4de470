# container.sh - everything runs inside an Apptainer image that has Python, torch and DeepSpeed.
#
# RUN is put before the Python command on every node. The image needs this package's requirements.
# The code is that of this folder, so an edit needs no new image.
: "${IMAGE:?set IMAGE to the .sif file}"
RUN=(apptainer exec --nv --bind "$PWD" "$IMAGE")
PYTHON=python3
