#pragma once

#include "attention_backward.h"
#include "attention_forward.h"
