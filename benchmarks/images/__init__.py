"""Image studies: LeNet and out-of-distribution images (`outside`), and a ResNet-20 by draws alone (`resnet`)."""
