// The only C++ list of rules; date_kernels/rules.py is the Python one.
#pragma once
#include "adadelta.h"
#include "adagrad.h"
#include "adam.h"
#include "lion.h"
#include "rmsprop.h"
#include "sgd.h"

#define DK_FOR_EACH_RULE(X) \
  X("sgd", Sgd)             \
  X("rmsprop", Rmsprop)     \
  X("adagrad", Adagrad)     \
  X("adam", Adam)           \
  X("adadelta", Adadelta)   \
  X("lion", Lion)
